"""Subcommands of ``clipdefense``, a module each; :mod:`clipdefense.native` registers them by name."""
