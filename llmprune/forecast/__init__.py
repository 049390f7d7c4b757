"""What a run is going to need: memory, disk and time, each as a sum of named parts that tell where they come from."""

from llmprune.forecast.dense import collected
from llmprune.forecast.disk import disk
from llmprune.forecast.duration import duration
from llmprune.forecast.memory import memory, peak
from llmprune.forecast.parts import Part, Workload

__all__ = ["Part", "Workload", "collected", "disk", "duration", "memory", "peak"]
