"""The configuration: a YAML file, checked as a whole, as frozen objects that know where they stand in the file.

Strategy: `load` reports everything that is wrong at once and never returns half a configuration; `findings` looks
further, at what is legal but cannot be meant. Neither binds, connects or fetches anything.
"""

from gateway.config.check import findings
from gateway.config.load import load
from gateway.config.schema import Config

__all__ = ["Config", "findings", "load"]
