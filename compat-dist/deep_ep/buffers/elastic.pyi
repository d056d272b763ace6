from tokenferry.compat.deep_ep.buffers.elastic import *  # noqa: F403
