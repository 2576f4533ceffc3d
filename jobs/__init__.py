"""From a manifest to finished artifacts: the task graph, and the places it can run. Knows nothing about numbers."""
