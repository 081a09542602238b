// Renders a chat template of a Modelfile for every conversation, as Ollama does: Go's text/template on System and
// Messages. Standard input: {"template": text, "chats": [{"System": text, "Messages": [{"Role": …, "Content": …}]}]};
// standard output: a JSON list of texts.
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"text/template"
)

type message struct{ Role, Content string }

type chat struct {
	System   string
	Messages []message
}

func main() {
	var asked struct {
		Template string
		Chats    []chat
	}
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("chat").Parse(asked.Template))
	rendered := []string{}
	for _, one := range asked.Chats {
		var text bytes.Buffer
		if err := parsed.Execute(&text, one); err != nil {
			panic(err)
		}
		rendered = append(rendered, text.String())
	}
	if err := json.NewEncoder(os.Stdout).Encode(rendered); err != nil {
		panic(err)
	}
}
