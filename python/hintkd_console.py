"""The console commands.  It stands outside of the packages that it imports: that takes a second, and Ctrl-C during it ends quietly too."""
import signal
from importlib import import_module


def hintkd() -> int:
    """The command `hintkd`, see hintkd/cli.py."""
    return _run("hintkd.cli")


def torchcaffe() -> int:
    """The command `torchcaffe`, see torchcaffe/cli.py."""
    return _run("torchcaffe.cli")


def _run(module: str) -> int:
    """Ctrl-C ends the process at once, as a shell's 130, until there is a command that can be interrupted; torch's import cannot."""
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    main = import_module(module).main
    signal.signal(signal.SIGINT, handler)
    return main()
