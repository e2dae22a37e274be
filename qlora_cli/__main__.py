"""`python -m qlora_cli` is `qlora`."""

from qlora_cli.cli.main import main

main()
