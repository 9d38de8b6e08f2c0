"""python -m eval.detection"""

from eval.detection.command import command

command()
