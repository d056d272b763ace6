from tokenferry.compat.deep_ep.buffer import *  # noqa: F403
