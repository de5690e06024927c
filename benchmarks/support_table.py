"""Every defense and the networks it takes, asked of the methods themselves: the table of docs/defenses.md.

python benchmarks/support_table.py
"""

from __future__ import annotations

from bbfast import defenses

MODELS = ("preactresnet18", "vgg19_bn", "convnext_tiny", "vit_b_16", "small_cnn")


def row(name: str) -> str:
    card = defenses.info(name)
    method = (
        f"{card['title']}, [{card['arxiv']}](https://arxiv.org/abs/{card['arxiv']})" if card["arxiv"] else card["title"]
    )
    taken = ["yes" if defenses.refusal(name, model) is None else "no" for model in MODELS]
    cells = [f"`{name}`", method, ", ".join(card["kinds"]), ", ".join(card["needs"]), *taken]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    print(f"| name | method | gives | granted | {' | '.join(MODELS)} |")
    print("|" + "---|" * (4 + len(MODELS)))
    for name in defenses.available():
        print(row(name))


if __name__ == "__main__":
    main()
