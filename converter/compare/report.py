"""wiring only"""
from typing import Any
def report_html(comparison: Any, tensors: Any, blocks: Any) -> str:
    return "<html></html>"
