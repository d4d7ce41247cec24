"""`python -m loadtest`."""

from loadtest.run import main

if __name__ == "__main__":
    main()
