"""The `headrace` command: one file per subcommand, imported when it is chosen."""
