"""`python -m fedlora` is `fedlora`."""

from fedlora.cli import main

if __name__ == "__main__":
    main()
