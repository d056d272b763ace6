"""tokenferry under the name of DeepEP; the modules themselves are in ``tokenferry.compat.deep_ep``."""

from tokenferry.compat import check_alone

check_alone()

from tokenferry.compat.deep_ep import *  # noqa: E402, F403
from tokenferry.compat.deep_ep import __all__, __path__, __version__  # noqa: E402, F401

from . import buffer, buffers, legacy, utils  # noqa: E402, F401
