"""The same adapter in other programs' layouts, each read back and compared."""

from toolkit.export.foreign import ForeignReport, verify_foreign
from toolkit.export.survival import Survival
from toolkit.export.write import FORMATS, Export, export_adapter, is_rounded_again

__all__ = [
    "FORMATS",
    "Export",
    "ForeignReport",
    "Survival",
    "export_adapter",
    "is_rounded_again",
    "verify_foreign",
]
