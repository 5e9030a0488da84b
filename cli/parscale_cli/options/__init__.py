"""Options that several commands have, each written once."""
