"""Why does a picture get its class? Page, figure and numbers of one prediction.

    python examples/explain_a_prediction.py [IMAGE] [-o why.html]

Without an image it draws a synthetic bird, which the model in the package knows.
"""

from __future__ import annotations

import argparse

import fgvczoo
from fgvczoo.data.synthbirds import draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?")
    parser.add_argument("-o", "--output", default="why.html", help="a .html page, .png figure or .json file")
    options = parser.parse_args()

    model = fgvczoo.load("st-protopnet-synthbirds")  # or a folder of your own run, or owner/name on the Hub
    if options.image is not None:
        picture, box = options.image, None
    else:
        bird = draw(seed=0, class_id=4, index=1000)  # none of the images that it learned from
        picture, box = bird.image, bird.box

    prediction = model.predict(picture, box=box)
    print(f"{prediction.label}: {prediction.score:.1%}")

    why = model.explain(picture, box=box, top=4)
    for evidence in why.evidence[: why.shown]:
        print(
            f"  {evidence.kind} prototype {evidence.prototype} of {evidence.prototype_class}: "
            f"similarity {evidence.similarity:.2f} x weight {evidence.weight:.2f} = {evidence.contribution:+.2f}"
        )
    print(f"all {len(why.evidence)} prototypes together: {why.logit:.2f}")
    print("written:", why.save(options.output))


if __name__ == "__main__":
    main()
