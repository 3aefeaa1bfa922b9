// The JDK's own client at its defaults: it asks for HTTP/2 with the first request of a connection, body and all.
// Run as `java Generate.java BASE_URL KEY`; prints a status, the version spoken and what was answered, a line each.
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;

public class Generate {
    public static void main(String[] arguments) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        for (String prompt : new String[] {"a fox", "a café in the rain"}) {
            HttpRequest request = HttpRequest.newBuilder(URI.create(arguments[0] + "/images/generations"))
                .header("Authorization", "Bearer " + arguments[1])
                .header("Content-Type", "application/json")
                .POST(HttpRequest.BodyPublishers.ofString("{\"prompt\": \"" + prompt + "\", \"seed\": 7}"))
                .build();
            HttpResponse<String> response = client.send(request, HttpResponse.BodyHandlers.ofString());
            System.out.println(response.statusCode() + " " + response.version() + " " + response.body());
        }
    }
}
