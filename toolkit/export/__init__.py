"""The same adapter in other programs' layouts, each read back and compared."""

from toolkit.export.foreign import ForeignReport, verify_foreign
from toolkit.export.quants import TAKES_QUANT, is_rounded_again, require_quant
from toolkit.export.survival import Survival
from toolkit.export.write import FORMATS, Export, export_adapter

__all__ = [
    "FORMATS",
    "TAKES_QUANT",
    "Export",
    "ForeignReport",
    "Survival",
    "export_adapter",
    "is_rounded_again",
    "require_quant",
    "verify_foreign",
]
