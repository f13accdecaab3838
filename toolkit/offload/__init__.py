"""Expert stacks that live in a file or in host memory and stream through two slots on the device."""

__all__: list[str] = []
