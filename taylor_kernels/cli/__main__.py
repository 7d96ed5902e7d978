"""`python -m taylor_kernels.cli`."""

from taylor_kernels.cli import main

main()
