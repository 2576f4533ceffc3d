"""How long tests wait for what they start. Machines are shared and noisy: only what hangs takes this long."""

PATIENCE_SECONDS = 1500
