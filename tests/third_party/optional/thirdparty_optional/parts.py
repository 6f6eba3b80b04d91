import thirdparty_absent.part  # noqa: F401


def attack(*args: object, **options: object) -> None: ...
