"""``python -m ditmoe_cli``: what ``torchrun -m`` starts."""

from ditmoe_cli.cli.app import main

if __name__ == "__main__":
    main()
