import sys

if __name__ == "__main__":
    print("python -m vit5gen.data.autoencoder is now `vit5gen autoencoder CONFIG --output FOLDER`", file=sys.stderr)
    sys.exit(2)
