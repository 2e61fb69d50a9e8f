"""The `jaxdiff` command."""

import argparse
import sys
from collections.abc import Sequence

from jaxdiff import __version__

__all__ = ["main"]


def _count(text: str) -> int:
    value = int(text)  # argparse turns the ValueError of a word into a message of its own
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxdiff", description="A functional sampling toolkit for score-based models in JAX."
    )
    parser.add_argument("--version", action="version", version=f"jaxdiff {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="train on real handwritten digits, sample, judge the samples",
        description="Train a denoiser on the 1,797 handwritten digits of scikit-learn, draw "
        "samples with several solvers, and write pictures and a table of distances to digits that "
        "were held out. Run it again to go on from the checkpoint, or to reuse it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", default="out", help="folder for everything that is written")
    demo.add_argument("--steps", type=_count, default=800, help="training steps in all")
    demo.add_argument("--num", type=_count, default=1000, help="samples per solver")
    demo.add_argument("--seed", type=int, default=0, help="seed of all that is random")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 on failure, 130 on Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        from jaxdiff import demo

        demo.run(args.out, steps=args.steps, num=args.num, seed=args.seed, progress=not args.quiet)
    except ImportError as error:
        if error.name is None or error.name.startswith("jaxdiff"):
            raise
        hint = 'install the extra: pip install "jaxdiff[demo]"'
        print(f"jaxdiff demo: {error.name} is missing; {hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"\njaxdiff demo: interrupted; what was trained is kept in {args.out}, "
            "run the same command to go on",
            file=sys.stderr,
        )
        return 130
    except (OSError, RuntimeError, ValueError) as error:
        print(f"jaxdiff demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
