"""The models that come with bbfast; every module here registers its own."""
