"""The subcommands of ``sparse-zero``, one module each."""
