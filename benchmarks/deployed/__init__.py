"""What deployed rounds are measured with: clocks at both ends, apps to submit, stand-ins for many sites."""
