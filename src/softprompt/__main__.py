"""`python -m softprompt`, which is also how `torchrun` and `accelerate launch` start the command."""

from softprompt.cli.main import main

main()
