"""How the shipped weights were made: programs that nothing else imports."""
