"""Expert stacks that live in a file or in host memory and stream through two slots on the device."""

from toolkit.offload.attach import StreamedStacks, load_streamed, stream_experts, stream_of
from toolkit.offload.cache import int8_folder
from toolkit.offload.stream import ExpertStream, Traffic

__all__ = ["ExpertStream", "StreamedStacks", "Traffic", "int8_folder", "load_streamed", "stream_experts", "stream_of"]
