"""`python -m finetune`: the installed command without its script."""

from finetune.cli import main

main()
