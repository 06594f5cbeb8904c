"""The trainings that chapters report on: small enough for one core and some minutes, each with its log in `book/data`."""
