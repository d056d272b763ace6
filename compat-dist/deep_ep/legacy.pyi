from tokenferry.compat.deep_ep.legacy import *  # noqa: F403
