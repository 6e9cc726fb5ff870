"""``python -m bayeskernel``."""

from bayeskernel.cli import main

main()
