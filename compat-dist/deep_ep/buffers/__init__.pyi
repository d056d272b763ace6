from . import elastic as elastic
from . import legacy as legacy
