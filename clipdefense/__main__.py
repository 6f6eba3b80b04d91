"""``python -m clipdefense``."""

from clipdefense.cli import main

main()
