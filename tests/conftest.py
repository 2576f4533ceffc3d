"""What holds for all tests: examples are not timed, since machines are shared and noisy."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# Files that run side by side share the cores: threads of several processes that wait for each other in turns cost far
# more than they bring. torch reads this when it is imported, and the commands that tests start inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
