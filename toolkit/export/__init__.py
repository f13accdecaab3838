"""The same adapter in other programs' layouts, each read back and compared."""

from toolkit.export.write import FORMATS, Export, export_adapter

__all__ = ["FORMATS", "Export", "export_adapter"]
