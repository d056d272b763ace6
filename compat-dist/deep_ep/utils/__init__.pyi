from tokenferry.compat.deep_ep.utils import *  # noqa: F403

from . import event as event
