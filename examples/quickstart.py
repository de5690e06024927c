import bbfast

data = bbfast.datasets.load("digits")
recipe = bbfast.Recipe.preset("quick", dataset="digits", epochs=20, lr=0.05)
badnets = bbfast.attacks.create("badnets", ratio=0.1)
attacked = bbfast.attack(badnets, data, model="small_cnn", recipe=recipe, seed=0)
print("badnets", {key: round(attacked.metrics[key], 4) for key in ("c_acc", "asr", "r_acc")})
for name in ("nc", "fp", "ft", "ac", "strip"):
    result = bbfast.defend(name, attacked, clean_fraction=0.05, seed=0)
    shown = [key for key in ("c_acc", "asr", "r_acc", "der", "rir", "tpr", "fpr", "auroc") if key in result.metrics]
    print(name, {key: round(result.metrics[key], 4) for key in shown}, f"{result.seconds:.1f} s")
