import sys

print("error: the command is now `vit5gen study CONFIG --output FOLDER`", file=sys.stderr)
sys.exit(2)
