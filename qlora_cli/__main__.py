"""Run the command line with `python -m qlora_cli`."""

from qlora_cli.cli.main import main

main()
