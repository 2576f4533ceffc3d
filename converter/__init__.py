"""One model in, measured artifacts out. Never imports ray: `jobs` knows how work is spread over machines."""

__version__ = "0.1.0"
