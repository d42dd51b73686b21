"""What commands do, as functions: `ditmoe_cli` shows them to Python users, and the command line calls them."""
