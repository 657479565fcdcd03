"""quantize8's command line as it is installed without the extra `run`: no torch, transformers or accelerate."""

import importlib.abc
import sys

RUN = ("torch", "transformers", "accelerate")


class Missing(importlib.abc.MetaPathFinder):
    """Finds none of the packages of the extra, whatever is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in RUN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def block() -> None:
    assert not set(RUN) & sys.modules.keys()
    sys.meta_path.insert(0, Missing())


if __name__ == "__main__":
    block()
    from quantize8.cli import main

    main()
