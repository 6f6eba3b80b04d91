"""Imports, at the top, a package that does not exist."""

import thirdparty_package_that_does_not_exist  # noqa: F401
