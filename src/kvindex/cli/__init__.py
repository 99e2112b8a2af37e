"""The ``kvindex`` command: one file a subcommand."""
