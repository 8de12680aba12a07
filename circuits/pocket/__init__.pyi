from .ready import facts as facts
from .ready import facts_task as facts_task
from .ready import fewshot_task as fewshot_task
from .ready import name_copying_task as name_copying_task
from .ready import path as path
from .ready import sentiment_task as sentiment_task
