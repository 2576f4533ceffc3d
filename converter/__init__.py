"""One model in, measured artifacts out. Never imports ray: how work is spread over machines is the business of `jobs`."""

__version__ = "0.1.0"
