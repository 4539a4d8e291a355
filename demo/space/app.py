"""What a Space runs. The settings are the Space's variables; README.md beside this file lists them."""

from demo.space.serve import main

if __name__ == "__main__":
    main()
