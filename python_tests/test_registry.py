"""The registry: built-in modules and entry points are found, names resolve, mistakes are named."""

from __future__ import annotations

import importlib
import logging
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from bbfast._registry import Registry
from bbfast.errors import UnknownNameError

MakePackage = Callable[..., str]


@pytest.fixture
def make_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakePackage:
    """Write a package of modules (name to source) into a folder on the path; gives its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(**modules: str) -> str:
        name = f"package_{uuid.uuid4().hex[:8]}"
        (tmp_path / name).mkdir()
        for module, source in {"__init__": "", **modules}.items():
            (tmp_path / name / f"{module}.py").write_text(source)
        importlib.invalidate_caches()
        return name

    return make


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Registry[str]], str]:
    """A module from which the packages of a test reach the registry under test."""

    def publish(registry: Registry[str]) -> str:
        name = f"hub_{uuid.uuid4().hex[:8]}"
        module = type(sys)(name)
        module.registry = registry  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
        return name

    return publish


def add_distribution(folder: Path, group: str, **points: str) -> None:
    """What pip writes when it installs a package with entry points."""
    info = folder / f"plugin_{uuid.uuid4().hex[:8]}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {info.name.split('-')[0]}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))


class TestNames:
    def test_register_and_get(self) -> None:
        registry: Registry[str] = Registry("attack", aliases={"badnet": "badnets"})
        assert registry.register("badnets")("A") == "A"
        registry.register("blended")("B")
        assert registry.names() == ["badnets", "blended"]
        assert registry.get("badnets") == registry.get("badnet") == "A"
        assert registry.canonical("badnet") == "badnets" == registry.canonical("badnets")

    def test_taken_names(self) -> None:
        registry: Registry[str] = Registry("attack", aliases={"badnet": "badnets"})
        registry.register("badnets")("A")
        with pytest.raises(ValueError, match="attack name 'badnets' is taken by 'A'"):
            registry.register("badnets")("B")
        with pytest.raises(ValueError, match="attack name 'badnet' is another spelling of 'badnets'"):
            registry.register("badnet")("B")
        assert registry.get("badnet") == "A"

    def test_unknown_names(self) -> None:
        registry: Registry[str] = Registry("attack", aliases={"badnet": "badnets"})
        registry.register("badnets")("A")
        with pytest.raises(UnknownNameError, match="unknown attack 'badnest'; did you mean 'badnet', 'badnets'"):
            registry.get("badnest")
        with pytest.raises(TypeError, match="attack name must be text, got int 3"):
            registry.get(3)  # type: ignore[arg-type]

    def test_an_alias_of_nothing_is_unknown(self) -> None:
        registry: Registry[str] = Registry("attack", aliases={"badnet": "badnets"})
        with pytest.raises(UnknownNameError):
            registry.get("badnet")

    def test_registries_are_apart(self) -> None:
        one: Registry[str] = Registry("attack")
        one.register("x")("A")
        assert Registry[str]("attack").names() == []


class TestDiscovery:
    def test_modules_of_a_package(self, make_package: MakePackage, hub: Callable[[Registry[str]], str]) -> None:
        registry: Registry[str] = Registry("attack")
        source = f"from {hub(registry)} import registry\nregistry.register(__name__.split('.')[-1])(__name__)"
        package = make_package(one=source, two=source, _helper="raise AssertionError('helpers register nothing')")
        registry._packages = (package,)
        assert not any(name.startswith(package) for name in sys.modules), "nothing is imported before it is asked for"
        assert registry.get("one") == f"{package}.one"
        assert registry.names() == ["one", "two"]

    def test_a_broken_built_in_module_is_an_error(self, make_package: MakePackage) -> None:
        registry: Registry[str] = Registry("attack", packages=(make_package(bad="import nothing_of_that_name"),))
        for _ in range(2):
            with pytest.raises(ModuleNotFoundError, match="nothing_of_that_name"):
                registry.names()

    def test_entry_points(self, tmp_path: Path, make_package: MakePackage, hub: Callable[[Registry[str]], str]) -> None:
        group = f"group.{uuid.uuid4().hex[:8]}"
        registry: Registry[str] = Registry("attack", entry_points=group)
        registry.register("badnets")("ours")
        source = f"from {hub(registry)} import registry\nregistry.register('third')('theirs')"
        package = make_package(plugin=source)
        add_distribution(tmp_path, group, third=f"{package}.plugin")
        assert registry.names() == ["badnets", "third"] and registry.get("third") == "theirs"

    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            ("raise RuntimeError('out of order')", "out of order"),
            ("import nothing_of_that_name", "nothing_of_that_name"),
            ("REGISTER badnets", "is taken by 'ours'"),
        ],
    )
    def test_a_broken_plugin_is_reported_and_left_out(
        self,
        tmp_path: Path,
        make_package: MakePackage,
        hub: Callable[[Registry[str]], str],
        caplog: pytest.LogCaptureFixture,
        source: str,
        reason: str,
    ) -> None:
        group = f"group.{uuid.uuid4().hex[:8]}"
        registry: Registry[str] = Registry("attack", entry_points=group)
        registry.register("badnets")("ours")
        start = f"from {hub(registry)} import registry\n"
        source = source.replace("REGISTER badnets", "registry.register('badnets')('theirs')")
        good = "registry.register('good')('good')"
        package = make_package(broken=start + source, good=start + good)
        add_distribution(tmp_path, group, broken=f"{package}.broken", good=f"{package}.good")
        with caplog.at_level(logging.WARNING, "bbfast._registry"):
            assert registry.names() == ["badnets", "good"]
        assert registry.get("badnets") == "ours"
        assert len(caplog.records) == 1 and reason in caplog.text
        assert f"attack plug-in broken ({package}.broken) could not be loaded" in caplog.text

    def test_threads_discover_once(self, make_package: MakePackage, hub: Callable[[Registry[str]], str]) -> None:
        registry: Registry[str] = Registry("attack")
        source = f"import time\nfrom {hub(registry)} import registry\ntime.sleep(0.05)\nregistry.register('x')('A')"
        registry._packages = (make_package(slow=source),)
        found: list[list[str]] = []
        threads = [threading.Thread(target=lambda: found.append(registry.names())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [["x"]] * 4
