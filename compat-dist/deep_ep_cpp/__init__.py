"""tokenferry under the name of DeepEP's compiled module."""

from tokenferry.compat import check_alone

check_alone()

from tokenferry.compat.deep_ep_cpp import *  # noqa: E402, F403
from tokenferry.compat.deep_ep_cpp import __all__  # noqa: E402, F401
